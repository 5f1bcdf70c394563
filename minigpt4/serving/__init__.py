"""The demo (demo.py): page.py and terminal.py show a dialogue, session.py holds it."""
