"""What a client sees. Read `app` (the Serve deployment), `http` (its routes) and `dialects` (how clients ask), then
`engine`, `codec`, `batcher`; `local` is the same engine without Serve, `launch` a server on this machine."""
