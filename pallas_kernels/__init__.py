"""Part of jaxserve, imported as `jaxserve.pallas_kernels` only."""

if not __name__.startswith("jaxserve."):
    raise ImportError(
        f"import jaxserve.pallas_kernels, not {__name__}: the bare name would be shadowed by any "
        "folder called 'pallas_kernels' beside a notebook or script"
    )
