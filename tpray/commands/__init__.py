"""The command line: one module for each command, and what they share (`flags`, `console`, `loading`).

Read `cli`, then the command. What a command does is in the packages below; here is how it is asked for and shown.
"""
