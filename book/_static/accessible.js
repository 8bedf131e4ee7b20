// What the theme and the outputs leave to be desired for those who hear a page or use no mouse.
"use strict";

// The arrows in the side bar that open a chapter's pages have no name: they get that of the chapter.
function nameArrows() {
  for (const summary of document.querySelectorAll("summary")) {
    if (summary.textContent.trim() || summary.hasAttribute("aria-label")) continue;
    const chapter = summary.closest("li")?.querySelector(":scope > a")?.textContent.trim();
    summary.setAttribute("aria-label", `Pages of: ${chapter || "this part"}`);
  }
}

// The search button shows 'Search Ctrl + K' and is called 'Search': what it shows is name enough.
function nameButtons() {
  for (const button of document.querySelectorAll("button.search-button-field[aria-label]")) {
    button.removeAttribute("aria-label");
  }
}

// A table that is wider than the screen scrolls, so the keyboard has to reach it.
function reachTables() {
  for (const table of document.querySelectorAll("article table")) {
    if (table.scrollWidth > table.clientWidth) table.tabIndex = 0;
    else table.removeAttribute("tabindex");
  }
}

document.addEventListener("DOMContentLoaded", () => {
  nameArrows();
  nameButtons();
  reachTables();
});
window.addEventListener("load", reachTables);
window.addEventListener("resize", reachTables);
