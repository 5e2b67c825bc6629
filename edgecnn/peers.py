"""Figures of others, shown beside ours and never on our front. Imports no torch.

They are of the CIFAR-10 test set (names.TEST_SET); no other images' figures stand beside them.
"""

# MLPerf Tiny's CIFAR-10 model, the int8 .tflite as published (benchmark v1.x).
# Accuracy: as published, and under tflite-micro (with its arena), measured on the 10,000 test images.
# MACs: of its layers, the 1x1 shortcuts included; none of its weights count as zero. Energy score: the
# same in millions x 8 / 8.
# NPU: the same file through the same Vela (5.2.0, default configuration of the Ethos-U55-128).
# Cortex-M4: the same file's 15 operators in CMSIS-NN (commit 99f736a6, DSP path), counted as ours are:
# gcc 12.2 -O3 (ours also -fno-schedule-insns), QEMU mps2-an386, outputs equal to tflite-micro's on
# 20 images; cycles by the same model.
# Energy: measured on an STM32L4R5, X-CUBE-AI 10.2 with external SMPS, results of round v1.3.
RESNET8 = {
    "name": "MLPerf Tiny ResNet-8 INT8",
    "accuracy_percent": 86.97,
    "tflite_micro_accuracy_percent": 87.07,
    "tflite_micro_arena_bytes": 55_984,
    "tflite_bytes": 98_496,
    "macs": 12_501_632,
    "macs_nonzero": 12_501_632,
    "relative_energy": 12.501632,
    "u55_128_cycles_modelled": 201_747,
    "u55_128_sram_bytes_modelled": round(50.6 * 1024),
    "u55_128_flash_bytes_modelled": round(77.4 * 1024),
    "m4_instructions": 29.87e6,
    "m4_flash_bytes": 103_568,
    "m4_ram_bytes": 53_596,
    "m4_cycles_modelled_low": 35.40e6,
    "m4_cycles_modelled": 40.59e6,
    "m4_cycles_modelled_high": 53.10e6,
    "stm32l4r5_energy_measured_uj": 5496,
}
# This project's first network, dense, in CMSIS-NN, counted alike; zeros do not help it.
CMSIS_NN = {"macs": 10_848_768, "weights": 619_872}
CMSIS_NN |= {"m4_instructions": 22.15e6, "m4_flash_bytes": 639_184}

# The table that this project started from, as published, by the variant of ours that answers a row.
# Its pruned MACs and sizes were assumed (half of the dense ones), not counted. MB are 2^20 bytes.
ORIGINAL = {
    "baseline_fp32": {
        "name": "FP32",
        "accuracy_percent": 78.73,
        "size_bytes": 2.37 * 2**20,
        "macs_nonzero": 10.85e6,
        "relative_energy": 43.40,
    },
    "baseline_int8": {
        "name": "INT8",
        "accuracy_percent": 78.49,
        "size_bytes": 0.64 * 2**20,
        "macs_nonzero": 10.85e6,
        "relative_energy": 10.85,
    },
    "pruned_50_fp32": {
        "name": "50 % pruned",
        "accuracy_percent": 80.74,
        "size_bytes": 1.19 * 2**20,
        "macs_nonzero": 5.42e6,
        "relative_energy": 21.70,
    },
}
