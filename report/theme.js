/* The tables' library looks for a class on <html>, Furo keeps the theme on <body>. */
(() => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const follow = () => {
    const theme = document.body.dataset.theme;
    document.documentElement.classList.toggle("dark", theme === "dark" || (theme !== "light" && system.matches));
  };
  new MutationObserver(follow).observe(document.body, { attributeFilter: ["data-theme"] });
  system.addEventListener("change", follow);
  follow();
})();
