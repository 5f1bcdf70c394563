"""The chat: prompt templates and conversations (conversation.py) and the engine (chat.py)."""
