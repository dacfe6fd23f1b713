"""What a run needs before it runs: bytes, seconds, money, energy. Closed forms only; nothing here imports torch, but
for `traced`, which runs the real engine on tensors without memory and compares."""
