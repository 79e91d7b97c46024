"""The score card: a model beside floors on held-out sections, in words, tables and files."""
