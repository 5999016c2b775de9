"""Part of jaxserve, imported as `jaxserve.models` only."""

if not __name__.startswith("jaxserve."):
    raise ImportError(
        f"import jaxserve.models, not {__name__}: the bare name would be shadowed by any folder "
        "called 'models' beside a notebook or script"
    )
