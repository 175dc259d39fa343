// Before the first paint, so that nobody sees the other theme flash: a classic script, not a module.
try {
  const theme = localStorage.getItem("minisd.theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // storage is forbidden: the system's theme stays
}
