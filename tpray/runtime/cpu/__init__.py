"""CPU cores: torch.export, lowered to oneDNN. `runtime` first; `passes`, `fusions`, `int8` and `packing` (with `bands`,
`token_axis` and `rows`) rewrite its graphs, `lowered` keeps them."""
