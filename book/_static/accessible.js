// What the theme and the outputs leave to be desired for those who hear a page or use no mouse.
"use strict";

// The arrows in the side bar that open a chapter's pages have no name: they get that of the chapter.
// What shows a hidden cell has words of its own, and another name beside them.
function nameArrows() {
  for (const summary of document.querySelectorAll("summary")) {
    if (summary.textContent.trim()) {
      summary.removeAttribute("aria-label");
      continue;
    }
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

// The icons of a button that has a name are pictures; their titles would contradict it. The theme
// draws them when it likes, so each button is watched.
function hideIcons() {
  const hide = (button) => {
    for (const title of button.querySelectorAll("svg title")) title.remove();
    for (const icon of button.querySelectorAll("svg[aria-labelledby]")) {
      icon.removeAttribute("aria-labelledby");
      icon.setAttribute("aria-hidden", "true");
    }
  };
  for (const button of document.querySelectorAll("button[aria-label]")) {
    hide(button);
    new MutationObserver(() => hide(button)).observe(button, { childList: true, subtree: true });
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
  hideIcons();
  reachTables();
});
window.addEventListener("load", reachTables);
window.addEventListener("resize", reachTables);
