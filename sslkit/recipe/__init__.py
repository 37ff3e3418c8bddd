"""A recipe: its typed tables (`schema`), and how files, defaults and overrides become one recipe (`resolve`).

Read `resolve` first.
"""
