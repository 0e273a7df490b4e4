"""Talk to trained models in a browser, and watch training runs.

    streamlit run scripts/web_demo.py                              # weights and runs in out/, http://127.0.0.1:8501
    streamlit run scripts/web_demo.py -- --out_dir my_out --model ./MiniMind2
    streamlit run scripts/web_demo.py -- --api_url http://127.0.0.1:8998/v1      # key in MINIMIND_API_KEY

The page is for this machine only, unless scripts/.streamlit/config.toml or `--server.address` say otherwise. What a
model writes is shown as text (scripts/web/safe_text.py): no HTML, no pictures from elsewhere, nothing is executed.

Reading order: this file → chat_page.py, dashboard_page.py in scripts/web/ → what they show: chat_state.py, runs.py.

中文：浏览器对话界面与训练面板。运行：streamlit run scripts/web_demo.py
"""

import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from scripts.web.options import parse_options  # noqa: E402
from scripts.web.texts import LANGUAGES, text  # noqa: E402
from trainer.command_line import UserError, run_script  # noqa: E402

# Drawn here: the icons that Streamlit knows by name would be fetched from elsewhere for the tab of the browser.
ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">
<path fill="#2f6db3" d="M4 5h24a2 2 0 0 1 2 2v15a2 2 0 0 1-2 2H14l-7 6v-6H4a2 2 0 0 1-2-2V7a2 2 0 0 1 2-2z"/>
<path fill="none" stroke="#fff" stroke-width="2.5" stroke-linecap="round" d="M8 12h16M8 18h10"/></svg>"""


def choose_language() -> str:
    """The language of the page: as chosen, as in its address, else the browser's."""
    import streamlit as st

    asked = st.query_params.get("lang") or ("zh" if (st.context.locale or "").startswith("zh") else "en")
    language = st.session_state.get("language") or (asked if asked in LANGUAGES else "en")
    st.session_state["language"] = language
    return language


def show() -> None:
    """One run of the page's script: navigation, then the page that was chosen."""
    import streamlit as st

    from scripts.web import chat_page, dashboard_page

    language = choose_language()
    say = partial(text, language)
    try:
        options = parse_options(sys.argv[1:])
    except UserError as error:
        st.set_page_config(page_title="MiniMind", page_icon=ICON)
        st.error(say("options_wrong"))
        st.text(str(error))
        return
    pages = [
        st.Page(partial(chat_page.show, options, say), title=say("chat"), url_path="chat", default=True),
        st.Page(partial(dashboard_page.show, options, language), title=say("dashboard"), url_path="training"),
    ]  # fmt: skip
    page = st.navigation(pages, position="top")
    wide = page.url_path == "training"
    st.set_page_config(page_title=f"MiniMind · {page.title}", page_icon=ICON, layout="wide" if wide else "centered")
    page.run()
    with st.sidebar:
        st.segmented_control(say("language"), list(LANGUAGES), format_func=LANGUAGES.get, key="language", required=True)
    if st.query_params.get("lang") != language:
        st.query_params["lang"] = language


def main() -> None:
    """Raises: UserError when it was started with plain Python, or streamlit is missing."""
    try:
        from streamlit import runtime
    except ImportError:
        raise UserError("The web page needs streamlit: pip install streamlit") from None
    if not runtime.exists():
        raise UserError("Start the web page with: streamlit run scripts/web_demo.py")
    show()


if __name__ == "__main__":
    if "streamlit" in sys.modules:  # which shows errors by itself
        main()
    else:
        run_script(main)
