"use strict";
// Keys of a hit that has the focus press its buttons. Without this file the buttons do the same.
document.addEventListener("keydown", (event) => {
  const hit = document.activeElement;
  if (event.ctrlKey || event.metaKey || event.altKey || !hit || !hit.classList.contains("hit")) return;
  const button = hit.querySelector(`button[data-key="${CSS.escape(event.key.toLowerCase())}"]`);
  if (!button) return;
  event.preventDefault();
  button.click();
  const next = hit.nextElementSibling;
  if (next && next.classList.contains("hit")) next.focus();
});
