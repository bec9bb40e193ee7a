"""What computes memories here."""

from __future__ import annotations

from hope_megatron.doctor.finding import NOTE, OK, WARNING, Finding


def check_memory_kernel() -> list[Finding]:
    """What computes memories, the only row that says so: the operator compiled for this CPU, built if it is not there yet."""
    from hope_megatron.ops.memory.backends.cpu.compiling import NoKernel, load

    try:
        return [
            Finding(
                "memory kernel", OK, f"on CPUs, compiled for this one: {load()._name}; elsewhere PyTorch's operators"
            )
        ]
    except NoKernel as reason:
        text = "none for this CPU: memories run through PyTorch's operators everywhere, several times slower on CPUs"
        return [Finding("memory kernel", NOTE, text, str(reason))]


def check_triton_kernels(families: list[str], *, cuda: bool) -> list[Finding]:
    """The Triton kernels of each family's memories against PyTorch."""
    from hope_megatron.doctor.kernel_rows import check_kernels

    try:
        rows = check_kernels(families, cuda=cuda)
    except RuntimeError as reason:
        return [
            Finding("Triton kernels", WARNING, str(reason), "set model.memory.kernel=phases until this is understood")
        ]
    findings = []
    for row in rows:
        topic, where = f"kernels of {row['family']}", row["device"]
        if not row["taken"]:
            findings.append(Finding(topic, NOTE, f"not for this family: {row['reason']}"))
        elif row["trusted"]:
            findings.append(
                Finding(topic, OK, f"right, worst error {row['worst']:.0e}, in {row['seconds']:.0f} s; {where}")
            )
        else:
            advice = "memory.kernel=auto does not use it; attach the output of `hope doctor --kernels --json` to a bug report"
            findings.append(Finding(topic, WARNING, f"wrong: {row['reason']}; {where}", advice))
    return findings
