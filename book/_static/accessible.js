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

// The icons of a button that has a name are pictures; their titles would contradict it.
function hideIcons() {
  for (const icon of document.querySelectorAll("button[aria-label] svg")) {
    icon.querySelectorAll("title").forEach((title) => title.remove());
    icon.removeAttribute("aria-labelledby");
    icon.setAttribute("aria-hidden", "true");
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
window.addEventListener("load", () => {
  hideIcons(); // they are drawn by now
  reachTables();
});
window.addEventListener("resize", reachTables);
