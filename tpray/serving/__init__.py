"""What a client sees. Read `app` (HTTP and the Serve deployment), `engine`, `text`, `batcher`, then a dialect
(`tei`); `local` is the same engine without Serve."""
