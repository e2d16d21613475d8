//! A visitor's story, in a browser.

use std::fs;

use crate::browser::Browser;
use crate::fixtures::{TestConnection, TestDatabase};
use crate::for_each_database;
use crate::guestbook::{Guestbook, target_folder};
use crate::support::browser_enabled;

for_each_database!(sqlite, postgres, mariadb => guestbook_works_in_a_browser);

fn guestbook_works_in_a_browser<C: TestConnection>(test_db: &TestDatabase) {
    if !browser_enabled() {
        return;
    }
    if let TestDatabase::Mariadb(_) = test_db {
        // The default of older servers. The table does not depend on it.
        C::establish(&test_db.url()).unwrap().batch_execute("ALTER DATABASE CHARACTER SET latin1").unwrap();
    }
    Story::begin(test_db).tell();
}

/// All that HTML has a meaning for, and a character beyond the first 65,536.
const AUTHOR: &str = "Ada <b>&\"' 😀";
const MESSAGE: &str = "<script>document.title = \"gone\"</script> &amp; <b>bold?</b> 😀";

struct Story {
    database: &'static str,
    browser: Browser,
    guestbook: Guestbook,
}

impl Story {
    fn begin(test_db: &TestDatabase) -> Story {
        Story { database: test_db.kind_name(), guestbook: Guestbook::on(test_db), browser: Browser::start() }
    }

    fn tell(&self) {
        self.an_empty_book();
        self.a_first_entry();
        self.a_message_that_is_missing();
        self.a_message_that_is_too_long();
        self.many_entries();
        self.an_entry_that_is_deleted();
        self.a_page_that_is_not_there();
        self.guestbook.assert_no_errors();
    }

    fn an_empty_book(&self) {
        self.browser.goto(&self.guestbook.at(""));
        assert_eq!(self.browser.find(".empty").text(), "Nobody has written anything yet. Be the first!");
        self.assert_total(0);
        self.look("empty");
    }

    fn a_first_entry(&self) {
        self.write(AUTHOR, MESSAGE);
        assert_eq!(self.texts("article strong"), [AUTHOR]);
        assert_eq!(self.texts("article .message"), [MESSAGE]);
        assert_eq!(self.browser.run("return document.title"), "Guestbook");
        self.assert_total(1);
    }

    fn a_message_that_is_missing(&self) {
        self.submit_unchecked("Grace", "");
        self.assert_complaint("Please write a message.");
        assert_eq!(self.browser.find("#author").value(), "Grace");
        self.assert_total(1);
        // Both wrong: the focus is in the first.
        self.submit_unchecked("", " \n");
        assert_eq!(self.texts(".problem"), ["Please tell us your name.", "Please write a message."]);
        assert_eq!(self.browser.find(":focus").id(), "author");
        self.look("refused");
        self.browser.goto(&self.guestbook.at(""));
        self.assert_total(1);
    }

    fn a_message_that_is_too_long(&self) {
        let long = "<b>&\"' é".repeat(251);
        assert_eq!(long.chars().count(), 2008);
        self.submit_unchecked(AUTHOR, &long);
        self.assert_complaint("At most 2000 characters, please; these are 2008.");
        assert_eq!(self.browser.find("#author").value(), AUTHOR);
        assert_eq!(self.browser.find("#message").value(), long);
        // It is mended in place.
        self.browser.run("document.querySelector('#message').value = 'Shorter.'");
        self.browser.follow(|| self.browser.find("form.card button").click());
        assert_eq!(self.texts("article .message"), ["Shorter.", MESSAGE]);
        self.assert_total(2);
    }

    fn many_entries(&self) {
        self.write(&"W".repeat(100), &"w".repeat(2000));
        for number in 4..=11 {
            self.write(
                "Ada",
                &format!("Number {number}\n\nA second paragraph, so that there is something to read here."),
            );
        }
        self.assert_total(11);
        assert_eq!(self.texts("article").len(), 10);
        assert_eq!(self.texts("nav span").concat(), "Page 1 of 2");
        assert!(self.texts("article .message")[0].starts_with("Number 11\n\nA second"));
        self.look("newest");

        self.browser.follow(|| self.browser.find("a[rel=next]").click());
        assert!(self.browser.url().ends_with("/?page=2"));
        assert_eq!(self.texts("article .message"), [MESSAGE]);
        assert_eq!(self.texts("nav span").concat(), "Page 2 of 2");
        self.look("oldest");
        self.browser.follow(|| self.browser.find("a[rel=prev]").click());
        assert_eq!(self.browser.url(), self.guestbook.at(""));
        assert_eq!(self.texts("article").len(), 10);
    }

    fn an_entry_that_is_deleted(&self) {
        self.browser.goto(&self.guestbook.at("?page=2"));
        self.browser.follow(|| self.browser.find("article button").click());
        // With it went the second page: the nearest is shown.
        self.assert_total(10);
        assert!(self.texts("nav").is_empty());
        assert!(!self.texts("article .message").contains(&MESSAGE.to_owned()));
    }

    fn a_page_that_is_not_there(&self) {
        self.browser.goto(&self.guestbook.at("nothing/here"));
        assert_eq!(self.browser.find("h1").text(), "Not found");
        self.look("missing");
        self.browser.follow(|| self.browser.find("a").click());
        assert_eq!(self.browser.url(), self.guestbook.at(""));
    }

    /// Fills in the form and sends it, as a visitor does.
    fn write(&self, author: &str, message: &str) {
        self.fill_in(author, message);
        self.browser.follow(|| self.browser.find("form.card button").click());
    }

    /// Sends what the browser itself would refuse to send.
    fn submit_unchecked(&self, author: &str, message: &str) {
        self.browser.run("for (field of document.querySelectorAll('[maxlength]')) field.removeAttribute('maxlength')");
        self.fill_in(author, message);
        self.browser.run("document.querySelector('form.card').noValidate = true");
        self.browser.follow(|| self.browser.find("form.card button").click());
    }

    fn fill_in(&self, author: &str, message: &str) {
        self.browser.run("document.querySelector('form.card').author.value = ''");
        self.browser.run("document.querySelector('form.card').message.value = ''");
        self.browser.find("#author").send_keys(author);
        self.browser.find("#message").send_keys(message);
    }

    /// The message is what is wrong; that is said beside it, and it has the focus.
    #[track_caller]
    fn assert_complaint(&self, wanted: &str) {
        assert_eq!(self.texts(".problem"), [wanted]);
        assert_eq!(
            self.texts("#message[aria-invalid=true][aria-describedby=message-problem] + #message-problem"),
            [wanted]
        );
        assert_eq!(self.browser.find(":focus").id(), "message");
    }

    #[track_caller]
    fn assert_total(&self, wanted: usize) {
        assert_eq!(self.browser.find("h2").text(), format!("Entries ({wanted})"));
    }

    fn texts(&self, css: &str) -> Vec<String> {
        self.browser.find_all(css).iter().map(|element| element.text()).collect()
    }

    /// Takes pictures, and looks whether the page fits into its width and can be read.
    fn look(&self, name: &str) {
        let folder = target_folder().join("screenshots");
        fs::create_dir_all(&folder).unwrap();
        for width in [400, 1280] {
            self.browser.set_width(width);
            for scheme in ["light", "dark"] {
                self.browser.set_scheme(scheme);
                self.browser.screenshot(&folder.join(format!("{}-{name}-{width}-{scheme}.png", self.database)));
            }
            assert_eq!(self.browser.run("return innerWidth"), width);
            let scrolled = self.browser.run("scrollTo(9999, 0); const x = scrollX; scrollTo(0, 0); return x");
            assert_eq!(scrolled, 0, "{name} scrolls at {width} pixels");
            // Also what is cut off, which makes nothing scroll.
            let beyond = self.browser.run(
                "return [...document.querySelectorAll('body *')].filter(element => {
                     const box = element.getBoundingClientRect();
                     return box.left < 0 || box.right > innerWidth || element.scrollWidth > element.clientWidth + 1
                         && getComputedStyle(element).display !== 'inline';
                 }).map(element => element.outerHTML)",
            );
            assert!(beyond.as_array().is_some_and(Vec::is_empty), "{name} is wider than {width} pixels: {beyond}");
            let small = self.browser.run(
                "return [...document.querySelectorAll('body, input, textarea, button, a, p, strong')]
                     .filter(element => parseFloat(getComputedStyle(element).fontSize) < 16)
                     .map(element => element.outerHTML)",
            );
            assert!(small.as_array().is_some_and(Vec::is_empty), "{name} has text below 16 pixels: {small}");
        }
    }
}
