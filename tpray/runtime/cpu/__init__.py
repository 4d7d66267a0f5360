"""CPU cores: torch.export, lowered to oneDNN. `runtime` first; `passes`, `int8` and `packing` rewrite its
graphs, `lowered` keeps them."""
