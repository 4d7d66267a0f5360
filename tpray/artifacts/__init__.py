"""Traced models on disk: what they say of themselves, where they are kept, and how one is found or made.

Read `manifest` (what vouches for an artifact), `folder` (an artifact on disk), `resolve` (from what the user named to
an artifact, or to what must be traced), `tracing` (one traces, the others wait), `store` (a URL that machines share).
No Ray and no ranks: who traces is handed in.
"""
