"""Chatting with a model: the page (page.py), the terminal (terminal.py) and the OpenAI API (openai_app.py)."""
