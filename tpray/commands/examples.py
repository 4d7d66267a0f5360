"""What each command's ``--help`` ends with: commands as they are typed, and what they do."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "serve": (
        ("tpray serve", "the embedded demo, on http://127.0.0.1:8000"),
        ("tpray serve MODEL --tp 2 --port 9000", "a Hub id or a checkpoint's directory, over two ranks"),
        ("tpray serve MODEL --for throughput", "as many groups as this machine answers most requests with"),
    ),
    "classify": (
        ("tpray classify 'a text' 'another'", "each by itself"),
        ("tpray classify --pair 'a text' 'another'", "both as one pair"),
        ("tpray classify --in texts.jsonl --out labels.jsonl", "a file; --resume goes on with it"),
        ("tpray classify --in 'texts/*.parquet' --out labels --replicas 2", "many files, by two groups"),
        ("tpray classify --in s3://bucket/t.csv --text-column body --out t.csv", "a table, also Parquet"),
    ),
    "rerank": (
        ("tpray rerank 'a query' 'a document' 'another'", "the best first"),
        ("tpray rerank 'a query' --in documents.jsonl --top-n 10", "the documents of a file"),
    ),
    "trace": (
        ("tpray trace MODEL --tp 2", "into the cache, where `tpray serve MODEL --tp 2` finds it"),
        ("tpray trace MODEL --tp 2 --out artifact", "into a directory, to copy and to serve"),
    ),
    "doctor": (
        ("tpray doctor", "this machine"),
        ("tpray doctor MODEL --tp 4", "how a model would be sharded"),
        ("tpray doctor --architectures", "what can be served"),
    ),
    "status": (
        ("tpray status", "the server on http://127.0.0.1:8000"),
        ("tpray status http://127.0.0.1:9000 --watch", "each second, until Ctrl-C"),
    ),
    "bench": (
        ("tpray bench --concurrency 1,8,32", "so many clients at a time"),
        ("tpray bench http://127.0.0.1:9000 --rate 20,50 --duration 30", "so many requests a second"),
    ),
}


def epilog(command: str) -> str:
    """The examples of a command as typer prints them, a paragraph each."""
    return "\n\n".join(("Examples:", *(f"{example}  # {meaning}" for example, meaning in EXAMPLES[command])))
