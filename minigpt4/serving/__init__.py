"""What the demo page and the terminal chat share: sessions (session.py); the terminal itself (terminal.py)."""
