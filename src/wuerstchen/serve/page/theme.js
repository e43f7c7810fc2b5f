// Runs before the first paint, so that the page does not flash in another theme.
try {
  const chosen = localStorage.getItem("wuerstchen.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // storage is blocked: use the system's theme
}
