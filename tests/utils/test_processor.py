"""Which processors are said to multiply bf16."""

from pathlib import Path

import pytest

from dinov2.utils.processor import multiplies_bf16

X86 = "processor\t: {n}\nmodel name\t: an avx512_bf16 processor\nflags\t\t: fpu avx512f {flags}\nbugs\t\t: none\n\n"
ARM = "processor\t: {n}\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd sve {flags}\nCPU implementer\t: 0x41\n\n"


@pytest.mark.parametrize(
    ("core", "flags", "expected"),
    [
        (X86, ["avx512_bf16", "avx512_bf16"], True),
        (X86, ["amx_bf16 amx_tile"], True),
        (X86, ["avx512_vnni"], False),
        (X86, ["avx512_bf16x"], False),
        (X86, ["avx512_bf16", "avx2"], False),
        (ARM, ["i8mm bf16 dgh"], True),
        (ARM, ["i8mm"], False),
        (ARM, ["bf16", ""], False),
    ],
)
def test_every_core_must_multiply_bf16(tmp_path: Path, core: str, flags: list[str], expected: bool) -> None:
    text = "".join(core.format(n=number, flags=flag) for number, flag in enumerate(flags))
    (tmp_path / "cpuinfo").write_text(text)
    assert multiplies_bf16(tmp_path / "cpuinfo") is expected


def test_any_doubt_about_bf16_is_a_no(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    assert not any(multiplies_bf16(tmp_path / name) for name in ("nothing", ".", "empty", "bytes"))
