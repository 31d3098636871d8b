"""The data room: from files to examples whose labels sit on the right tokens.

`sources` reads rows, `columns` finds what is in them, `chat` renders conversations and finds the
assistant's words, `encoding` turns text into tokens, and `tasks` puts these together.
"""
