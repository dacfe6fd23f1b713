"""How the peers that several benchmarks measure are set up."""

from __future__ import annotations

from typing import Any


def trainer_zero2() -> dict[str, Any]:
    """Hugging Face Trainer's ds_config for ZeRO-2, as its documentation has it; "auto" is filled in by the Trainer."""
    return {
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": True,
            "reduce_scatter": True,
            "contiguous_gradients": True,
            "allgather_bucket_size": 2e8,
            "reduce_bucket_size": 2e8,
        },
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
