"""What a training step keeps, where it keeps it, and what it computes again: so that a length fits.

Pure (no GPU, no processes):
    choices.py   what can be chosen: for each layer what is kept and where; tiles; head groups
    matrices.py, shape.py   a model's sizes, kind of layer by kind of layer; its linear modules, and LoRA beside them
    adapters.py  what LoRA changes in these: frozen weights, in 4 bits where asked, and adapters beside them
    engines.py, setting.py, working_set.py   bytes: of an engine's states, of a rank's, of one token in one layer
    pinned.py    what pinning takes beyond that
    budget.py    all of it together: model, setting and choices in, a breakdown of the step's peaks out
    policy.py    the choices with the least to compute again among those that fit
    describe.py  a decision in words; refusals; out of memory
At work:
    install.py   choices into a model
    layers.py    a decoder layer as a checkpoint of our own: input and attention's result kept, spilled or made again
    tiles.py     MLPs and norms a tile of tokens at a time
    recall.py    how the attention operator gives its result to a layer and gets it back
    gather.py    a layer's whole weights out of its turn (FSDP2, ZeRO-3)
    kept.py, spill.py, pool.py, copies.py, host.py   tensors that wait on GPU or host; how much host there is
"""
