"""Part of jaxserve, imported as `jaxserve.server` only."""

if not __name__.startswith("jaxserve."):
    raise ImportError(
        f"import jaxserve.server, not {__name__}: the bare name would be shadowed by any folder "
        "called 'server' beside a notebook or script"
    )
