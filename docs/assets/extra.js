// Wide tables scroll by themselves; with this they do so from the keyboard, too.
document.addEventListener("DOMContentLoaded", () => {
  const reachable = () =>
    document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code").forEach((one) => {
      one.tabIndex = 0;
    });
  reachable();
  setTimeout(reachable, 100); // the theme wraps tables after this
});
