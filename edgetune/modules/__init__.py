"""Any `torch.nn.Module`: a network of your own, adapted under a device's budget and exported.

    frozen      a weight on a 4-bit grid, or dense; products with it that save nothing dequantized
    layers      Linear, Conv1d and Conv2d over such a weight, with LoRA; which layers stay as they are, and why
    attached    attach(): the network with those layers in it; its summary
    files       its adapter in PEFT's format
    budget      budget(): a device's memory limit around any code
    plan        plan_module(): every byte of the peak, measured by a traced step
    trainer     train_module(): a run folder, inside the budget, with exact resume
    forms       the layers as ONNX nodes
    exporter    export_module(): a bundle folder behind a parity gate
    bench       bench_module(): latency and peak of a bundle, in a process of its own (worker)

The decoder's engine is not used: the forward pass is the network's own and the gradients are torch.autograd's. What is
shared is what a budget is, how a weight lies on a grid, what LoRA's settings mean, optimizers, checkpoints and files.
`bench` and `worker` need no torch.
"""
