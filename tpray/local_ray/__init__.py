"""A Ray of one's own on this machine and on loopback, for the commands, scripts and notebooks; and its watchdog.

Read `local` (start, join, stop), `preflight` (what the machine must have), `watchdog`. Nothing here
knows what will run on that Ray.
"""
