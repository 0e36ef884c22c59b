"""Chats in the files that people have: read, checked, set aside with a reason."""
