"""A button that copies a text. The text travels as data to code written here; it never becomes part of a page.

中文：复制按钮；文本只作为数据传递，不会成为页面代码。
"""

import streamlit as st

HTML = """<button type="button"><svg viewBox="0 0 20 20" width="18" height="18" fill="none" stroke="currentColor"
 stroke-width="1.6" stroke-linecap="round" stroke-linejoin="round"><path class="copy"
 d="M8 7h8v10H8zM13 4H5v9"/><path class="done" d="M4 11l4 4 8-10"/></svg></button>"""
CSS = """
button { all: unset; cursor: pointer; display: flex; align-items: center; height: 1.75rem;
         color: var(--st-text-color); }
button:hover, button:focus-visible { color: var(--st-primary-color); }
button .done, button.copied .copy { display: none; }
button.copied .done { display: inline; }
"""
# navigator.clipboard exists on https and on this machine; elsewhere the old way still works.
JS = """
export default function ({ data, parentElement }) {
  const button = parentElement.querySelector("button");
  button.title = data.label;
  button.setAttribute("aria-label", data.label);
  button.onclick = async () => {
    let copied = true;
    try {
      await navigator.clipboard.writeText(data.text);
    } catch {
      const area = document.createElement("textarea");
      area.value = data.text;
      document.body.appendChild(area);
      area.select();
      copied = document.execCommand("copy");
      area.remove();
    }
    if (!copied) return;
    button.classList.add("copied");
    setTimeout(() => button.classList.remove("copied"), 1500);
  };
}
"""


def copy_button(text: str, label: str, key: str) -> None:
    """Args: label: what the button is called."""
    component = st.components.v2.component("minimind_copy", html=HTML, css=CSS, js=JS)
    component(data={"text": text, "label": label}, key=key, width="content", height="content")
