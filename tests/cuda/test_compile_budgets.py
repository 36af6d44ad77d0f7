"""The reading of the compiler's report: does it notice what it is there for?"""

from __future__ import annotations

import compile_budgets
import pytest

BLOCKS = compile_budgets.constant("kBlocksByRegisters")
NAMES = [
    f"_ZN7rnn_ext4cuda2{n}persistent_{way}_kernelI"
    f"NS_{cell}ENS0_8BFloat16ELNS0_3CutE1ELNS0_8ExchangeE0EEEvv"
    for n, way in ((5, "forward"), (6, "backward"))
    for cell in ("7RnnCellILb0EE", "7RnnCellILb1EE", "8LstmCell", "7GruCell")
]


def entry(name: str, registers: int = 190, stack: int = 0, spills: int = 0, smem: int = 0) -> str:
    shared = f", {smem} bytes smem" if smem else ""
    return f"""\
ptxas info    : Compiling entry function '{name}' for 'sm_80'
ptxas info    : Function properties for {name}
    {stack} bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers{shared}, 800 bytes cmem[0]
ptxas info    : Compile time = 281.645 ms
"""


def found(*entries: str) -> list[str]:
    report = "ptxas info    : 0 bytes gmem\n" + "".join(entries)
    return compile_budgets.violations(compile_budgets.parse(report), [80], (4, 4))


def test_a_good_report_passes() -> None:
    other = "_ZN7rnn_ext4cuda16move_rows_kernelINS0_8BFloat16EEEvv"
    assert not found(*map(entry, NAMES), entry(other, stack=88))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"spills": 8}, "16 bytes spilled"),
        ({"stack": 16}, "a stack of 16 bytes"),
        ({"smem": 512}, "512 bytes of static shared memory"),
        (
            {"registers": 257 // compile_budgets.constant("kBlocksByRegisters")},
            "registers, too many",
        ),
    ],
)
def test_a_bad_kernel_is_noticed(bad: dict[str, int], message: str) -> None:
    (line,) = found(*map(entry, NAMES[1:]), entry(NAMES[0], **bad))
    assert message in line
    assert NAMES[0] in line


def test_spills_of_any_kernel_are_noticed() -> None:
    other = "_ZN7rnn_ext4cuda16move_rows_kernelINS0_8BFloat16EEEvv"
    assert len(found(*map(entry, NAMES), entry(other, spills=4))) == 1


def test_a_missing_kernel_is_noticed() -> None:
    assert found(*map(entry, NAMES[1:])) == [
        "3 instead of 4 kernels persistent_forward_kernel for sm_80"
    ]


def test_a_report_of_another_form_is_an_error() -> None:
    with pytest.raises(ValueError, match="not understood"):
        found(entry(NAMES[0]).replace("Used", "Uses"))


def test_constants_are_read() -> None:
    assert compile_budgets.constant("kThreads") % 32 == 0
    with pytest.raises(AssertionError, match="no constant kNothing"):
        compile_budgets.constant("kNothing")


MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}"


def test_tensor_core_instructions_are_looked_for_in_each_kernel() -> None:
    ptx = (
        f".visible .entry {NAMES[0]}(.param) {{ {MMA} }}\n"
        f".visible .entry {NAMES[1]}(.param) {{ fma.rn.f32 }}\n"
        f".visible .entry {NAMES[2].replace('CutE1E', 'CutE0E')}(.param) {{ fma.rn.f32 }}\n"
        f".visible .entry other_kernel(.param) {{ {MMA} }}\n"
    )
    (line,) = compile_budgets.missing_instructions(ptx, 80)
    assert line.startswith("no mma")
    assert line.endswith(NAMES[1])
    assert compile_budgets.missing_instructions("", 80) == ["(there is no persistent kernel)"]


def test_cluster_instructions_are_looked_for_where_there_are_clusters() -> None:
    name = NAMES[0].replace("ExchangeE0E", "ExchangeE1E")
    store = "mapa.shared::cluster.u32 %r1; st.shared::cluster.v4.u32 [%r1]"
    good = f".visible .entry {name}(.param) {{ {MMA} barrier.cluster.wait; {store} }}\n"
    bad = f".visible .entry {name}(.param) {{ {MMA} {store} }}\n"
    assert not compile_budgets.missing_instructions(good, 90)
    assert not compile_budgets.missing_instructions(bad, 89)
    (line,) = compile_budgets.missing_instructions(bad, 90)
    assert "barrier" in line
