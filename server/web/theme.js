// Light or dark, before anything is drawn. A plain script: modules would come a frame too late.
(() => {
  const KEY = "jaxserve.theme";
  const read = () => {
    try {
      return localStorage.getItem(KEY) || "auto";
    } catch {
      return "auto"; // storage is off
    }
  };
  const apply = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  };
  window.jaxserveTheme = {
    read,
    set(theme) {
      try {
        localStorage.setItem(KEY, theme);
      } catch {
        // it holds for this page only
      }
      apply(theme);
    },
  };
  apply(read());
})();
