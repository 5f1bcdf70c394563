"""Dialogues and their answers: Conversation (conversation.py), the engine Chat (chat.py) and decoding."""
