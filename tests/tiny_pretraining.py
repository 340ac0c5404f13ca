"""Options of a pretraining that takes a second, for tests of what starts it."""

TINY = (
    *("student.arch=vit_tiny", "student.patch_size=16", "crops.global_crops_size=32", "crops.local_crops_size=16"),
    *(f"{head}.head_{option}" for head in ("dino", "ibot") for option in ("n_prototypes=64", "hidden_dim=32")),
    *("dino.head_bottleneck_dim=16", "ibot.head_bottleneck_dim=16", "crops.local_crops_number=2"),
    *("optim.epochs=1", "optim.warmup_epochs=0", "train.batch_size_per_gpu=4", "train.log_period=1"),
    "train.device=cpu",
    *(
        f"compute_precision.{network}.{part}.mixed_precision.param_dtype=fp32"
        for network in ("student", "teacher")
        for part in ("backbone", "dino_head", "ibot_head")
    ),
)
