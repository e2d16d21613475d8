use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use ureq::Agent;

use crate::client::{Answer, agent};
use crate::element::Element;
use crate::service::Service;
use crate::support::{program, wait};

/// A headless Chromium, driven by chromedriver through the WebDriver protocol.
///
/// What is asked for and not there is a panic; every panic of its thread shows the page.
pub(crate) struct Browser {
    agent: Agent,
    /// The address of the browser's session at chromedriver.
    session: String,
    /// Dropped last: it ends chromedriver and whatever is left of the browser.
    _driver: Service,
}

const LOAD_LIMIT: Duration = Duration::from_secs(30);

const FLAGS: [&str; 11] = [
    "--headless",
    "--hide-scrollbars",
    // Chromium's sandbox refuses root, and it sees no page but ours.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    // It looks for nothing on the network.
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--user-data-dir=",
];

impl Browser {
    pub(crate) fn start() -> Browser {
        let found = |names: &[&str]| names.iter().find_map(|name| program::find(name, &[]).ok());
        let (Some(chromium), Some(chromedriver)) = (found(&["chromium", "chromium-browser"]), found(&["chromedriver"]))
        else {
            panic!(
                "there is no `chromium` or no `chromedriver`: `scripts/setup` installs them (Debian: chromium \
                 chromium-driver), and DIESEL_SESSION_TEST_WITHOUT=browser goes without."
            );
        };
        let mut driver = Service::new();
        let (_, port) =
            driver.start(&chromedriver, &[], &["--port=0"], "ChromeDriver was started successfully on port ");
        let data = driver.folder().join("data");
        let flags =
            FLAGS.map(|flag| if flag.ends_with('=') { format!("{flag}{}", data.display()) } else { flag.into() });
        let options = json!({ "binary": chromium, "args": flags });
        let wanted = json!({ "capabilities": { "alwaysMatch": { "goog:chromeOptions": options } } });
        let sessions = format!("http://127.0.0.1:{}/session", port.trim_end_matches('.'));
        let mut browser = Browser { agent: agent(), session: sessions, _driver: driver };
        let id = browser.post("", &wanted)["sessionId"].as_str().expect("a session has an id").to_owned();
        browser.session = format!("{}/{id}", browser.session);
        browser
    }

    pub(crate) fn goto(&self, url: &str) {
        self.post("/url", &json!({ "url": url }));
    }

    /// Does something that leads to another page, and waits until that is there.
    pub(crate) fn follow(&self, step: impl FnOnce()) {
        self.run("window.isLeft = true");
        step();
        let arrived = || self.run("return !window.isLeft && document.readyState === 'complete'") == true;
        assert!(wait::until(LOAD_LIMIT, arrived), "the page stays");
    }

    pub(crate) fn url(&self) -> String {
        self.get("/url").as_str().expect("an address").to_owned()
    }

    /// The one element that a CSS selector means.
    #[track_caller]
    pub(crate) fn find(&self, css: &str) -> Element<'_> {
        let mut found = self.find_all(css);
        assert_eq!(found.len(), 1, "elements `{css}`");
        found.remove(0)
    }

    pub(crate) fn find_all(&self, css: &str) -> Vec<Element<'_>> {
        let found = self.post("/elements", &json!({ "using": "css selector", "value": css }));
        found.as_array().expect("a list").iter().map(|element| Element::new(self, element)).collect()
    }

    /// Runs JavaScript as a visitor's console would; what it returns.
    pub(crate) fn run(&self, script: &str) -> Value {
        self.post("/execute/sync", &json!({ "script": script, "args": [] }))
    }

    /// The width of the page in CSS pixels, also one that no window can have.
    pub(crate) fn set_width(&self, width: u32) {
        let metrics = json!({ "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": false });
        self.devtools("Emulation.setDeviceMetricsOverride", &metrics);
    }

    /// `light` or `dark`, as the visitor's system would say.
    pub(crate) fn set_scheme(&self, scheme: &str) {
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.devtools("Emulation.setEmulatedMedia", &json!({ "features": features }));
    }

    /// The whole page as a PNG.
    pub(crate) fn screenshot(&self, file: &Path) {
        let taken = self.devtools("Page.captureScreenshot", &json!({ "captureBeyondViewport": true }));
        fs::write(file, base64_decoded(taken["data"].as_str().expect("a picture"))).unwrap();
    }

    fn devtools(&self, command: &str, parameters: &Value) -> Value {
        self.post("/goog/cdp/execute", &json!({ "cmd": command, "params": parameters }))
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        self.value(path, &Answer::of(self.agent.get(format!("{}{path}", self.session)).call()))
    }

    pub(crate) fn post(&self, path: &str, parameters: &Value) -> Value {
        let request = self.agent.post(format!("{}{path}", self.session)).header("Content-Type", "application/json");
        self.value(path, &Answer::of(request.send(parameters.to_string())))
    }

    fn value(&self, path: &str, answer: &Answer) -> Value {
        assert_eq!(answer.status, 200, "chromedriver on `{path}`: {}", answer.body);
        answer.json()["value"].take()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if thread::panicking() {
            let source = self.agent.get(format!("{}/source", self.session)).call();
            eprintln!("What the browser showed:\n{}", Answer::of(source).body);
        }
        // Only the polite way; the driver's end is the certain one.
        let _ = self.agent.delete(&self.session).call();
    }
}

fn base64_decoded(text: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut held, mut bits) = (Vec::new(), 0_u32, 0);
    for digit in text.bytes().map_while(|byte| DIGITS.iter().position(|digit| *digit == byte)) {
        (held, bits) = (held << 6 | digit as u32, bits + 6);
        if bits >= 8 {
            bits -= 8;
            bytes.push((held >> bits) as u8);
        }
    }
    bytes
}
