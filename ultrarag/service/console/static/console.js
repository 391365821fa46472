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
// What happens to a job comes as events; with each the page asks for its part anew. Without this file it reloads.
addEventListener("DOMContentLoaded", () => {
  const job = document.querySelector("#job[data-events]");
  if (!job) return;
  const source = new EventSource(job.dataset.events);
  const renew = () => htmx.ajax("GET", job.dataset.address, { target: "#job", swap: "innerHTML" });
  for (const name of ["started", "progress"]) source.addEventListener(name, renew);
  for (const name of ["done", "refused", "failed", "cancelled", "interrupted"]) {
    source.addEventListener(name, () => { source.close(); setTimeout(renew, 300); });
  }
});
