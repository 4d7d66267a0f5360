"""Clients that people have, asking a real server."""
