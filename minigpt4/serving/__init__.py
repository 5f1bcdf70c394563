"""The demo (demo.py): its page (page.py), the terminal (terminal.py), the sessions of both (session.py)."""
