"""Published figures of others, shown beside ours and never on our front. Imports no torch."""

TEST_SET = "CIFAR-10 test set"  # they are of it; no other images' figures stand beside them

# MLPerf Tiny's CIFAR-10 model, int8 .tflite as published (benchmark v1.x), on the 10,000 test images.
# NPU: the same file through the same Vela (5.2.0, default configuration of the Ethos-U55-128).
# Energy: measured on an STM32L4R5, X-CUBE-AI 10.2 with external SMPS, results of round v1.3.
RESNET8 = {
    "name": "MLPerf Tiny ResNet-8 INT8",
    "accuracy_percent": 86.97,
    "macs": 12.5e6,
    "tflite_bytes": 98_496,
    "u55_128_cycles_modelled": 201_747,
    "u55_128_sram_bytes_modelled": round(50.6 * 1024),
    "u55_128_flash_bytes_modelled": round(77.4 * 1024),
    "stm32l4r5_energy_measured_uj": 5496,
}

# The table that this project started from, as published, by the variant of ours that answers a row.
# Its pruned MACs and sizes were assumed (half of the dense ones), not counted. MB are 2^20 bytes.
ORIGINAL = {
    "baseline_fp32": {
        "name": "FP32",
        "accuracy_percent": 78.73,
        "size_mb": 2.37,
        "macs_m": 10.85,
        "relative_energy": 43.40,
    },
    "baseline_int8": {
        "name": "INT8",
        "accuracy_percent": 78.49,
        "size_mb": 0.64,
        "macs_m": 10.85,
        "relative_energy": 10.85,
    },
    "pruned_50_fp32": {
        "name": "pruned 50 %",
        "accuracy_percent": 80.74,
        "size_mb": 1.19,
        "macs_m": 5.42,
        "relative_energy": 21.70,
    },
}
