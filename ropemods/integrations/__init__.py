"""ropemods where a framework asks for a class of its own."""
