use serde_json::{Value, json};

use crate::browser::Browser;

/// An element of the page that a browser shows.
pub(crate) struct Element<'b> {
    browser: &'b Browser,
    /// Its address within the browser's session.
    path: String,
}

impl<'b> Element<'b> {
    pub(crate) fn new(browser: &'b Browser, reference: &Value) -> Element<'b> {
        // The name that the WebDriver standard gives to a reference.
        let id = reference["element-6066-11e4-a52e-4f735466cecf"].as_str().expect("a reference to an element");
        Element { browser, path: format!("/element/{id}") }
    }

    /// As it is shown.
    pub(crate) fn text(&self) -> String {
        self.ask("text")
    }

    /// What is in a field.
    pub(crate) fn value(&self) -> String {
        self.ask("property/value")
    }

    pub(crate) fn id(&self) -> String {
        self.ask("property/id")
    }

    pub(crate) fn click(&self) {
        self.browser.post(&format!("{}/click", self.path), &json!({}));
    }

    /// Types into a field.
    pub(crate) fn send_keys(&self, text: &str) {
        self.browser.post(&format!("{}/value", self.path), &json!({ "text": text }));
    }

    fn ask(&self, what: &str) -> String {
        self.browser.get(&format!("{}/{what}", self.path)).as_str().expect("a text").to_owned()
    }
}
