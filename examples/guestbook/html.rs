//! The responses as web pages.

use std::fmt;

use axum::http::StatusCode;
use axum::http::header::CONTENT_SECURITY_POLICY;
use axum::response::{Html, IntoResponse, Response};

use crate::entry::Entry;
use crate::form::{AUTHOR_LENGTH, Form, MESSAGE_LENGTH, Problems};
use crate::page::Page;

/// The page of the guestbook: a form and entries.
pub(crate) fn guestbook(page: &Page, form: &Form, problems: &Problems) -> Response {
    let entries = if page.entries.is_empty() {
        "<p class=\"quiet empty\">Nobody has written anything yet. Be the first!</p>".to_owned()
    } else {
        let items: String = page.entries.iter().map(|entry| item(entry, page.number)).collect();
        format!("<ol>{items}</ol>")
    };
    document(
        "Guestbook",
        &format!(
            "<h1>Guestbook</h1><p class=\"lead\">Leave a few words for the next visitor.</p>{form}\
             <section aria-labelledby=\"entries\">\
             <h2 id=\"entries\">Entries <span class=\"count\">({total})</span></h2>{entries}{links}</section>",
            form = entry_form(form, problems),
            total = page.total,
            links = links(page),
        ),
    )
}

/// A page with one notice.
pub(crate) fn notice(status: StatusCode, title: &str, text: &str) -> Response {
    let (shown, text) = (Escaped(title), Escaped(text));
    let body =
        format!("<h1>{shown}</h1><p class=\"lead\">{text}</p><a class=\"button\" href=\"/\">To the guestbook</a>");
    (status, document(title, &body)).into_response()
}

fn document(title: &str, body: &str) -> Response {
    let html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{title}</title><style>{style}</style></head><body><main>{body}</main></body></html>\n",
        title = Escaped(title),
        style = include_str!("style.css"),
    );
    // Escaping prevents scripts. If an escape is missing, the browser still runs no script.
    let policy =
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";
    ([(CONTENT_SECURITY_POLICY, policy)], Html(html)).into_response()
}

fn entry_form(form: &Form, problems: &Problems) -> String {
    let (author, message) = (Escaped(&form.author), Escaped(&form.message));
    let author_problem = complaint("author", problems.author.as_deref());
    let message_problem = complaint("message", problems.message.as_deref());
    let author_mark = mark("author", problems.author.is_some(), true);
    let message_mark = mark("message", problems.message.is_some(), problems.author.is_none());
    // HTML drops a line break after `<textarea>`. This line break preserves a line break of the visitor.
    format!(
        "<form class=\"card\" method=\"post\" action=\"/entries\">\
         <div class=\"field\"><label for=\"author\">Your name</label>\
         <input id=\"author\" name=\"author\" value=\"{author}\" required maxlength=\"{AUTHOR_LENGTH}\" autocomplete=\"name\"{author_mark}>\
         {author_problem}</div>\
         <div class=\"field\"><label for=\"message\">Your message</label>\
         <textarea id=\"message\" name=\"message\" rows=\"4\" required maxlength=\"{MESSAGE_LENGTH}\"{message_mark}>\n{message}</textarea>\
         {message_problem}</div>\
         <button>Write</button></form>"
    )
}

/// The attributes of an invalid field. The first invalid field gets the focus.
fn mark(field: &str, wrong: bool, first: bool) -> String {
    if !wrong {
        return String::new();
    }
    let focus = if first { " autofocus" } else { "" };
    format!(" aria-invalid=\"true\" aria-describedby=\"{field}-problem\"{focus}")
}

/// The text that describes the problem of a field.
fn complaint(field: &str, problem: Option<&str>) -> String {
    problem.map_or_else(String::new, |problem| {
        format!("<p class=\"problem\" id=\"{field}-problem\">{}</p>", Escaped(problem))
    })
}

fn item(entry: &Entry, page: i64) -> String {
    let Entry { id, author, message, written_at } = entry;
    format!(
        "<li><article><header><strong>{author}</strong><time datetime=\"{machine}\">{human}</time></header>\
         <form method=\"post\" action=\"/entries/{id}/delete?page={page}\">\
         <button class=\"plain\" aria-label=\"Delete the entry by {author}\">Delete</button></form>\
         <p class=\"message\">{message}</p></article></li>",
        author = Escaped(author),
        message = Escaped(message),
        machine = written_at.format("%Y-%m-%dT%H:%M:%SZ"),
        human = written_at.format("%-d %B %Y, %H:%M UTC"),
    )
}

fn links(page: &Page) -> String {
    if page.pages == 1 {
        return String::new();
    }
    let link = |there: bool, number: i64, rel: &str, text: &str| {
        if there {
            format!("<a rel=\"{rel}\" href=\"{}\">{text}</a>", Page::link(number))
        } else {
            "<span></span>".into()
        }
    };
    format!(
        "<nav aria-label=\"Pages\">{newer}<span>Page {number} of {pages}</span>{older}</nav>",
        newer = link(page.number > 1, page.number - 1, "prev", "← Newer"),
        number = page.number,
        pages = page.pages,
        older = link(page.number < page.pages, page.number + 1, "next", "Older →"),
    )
}

/// Escapes a text for HTML, also for a quoted attribute. All text of visitors must be escaped.
struct Escaped<'t>(&'t str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0;
        while let Some(at) = rest.find(['&', '<', '>', '"', '\'']) {
            f.write_str(&rest[..at])?;
            f.write_str(match rest.as_bytes()[at] {
                b'&' => "&amp;",
                b'<' => "&lt;",
                b'>' => "&gt;",
                b'"' => "&quot;",
                _ => "&#39;",
            })?;
            rest = &rest[at + 1..];
        }
        f.write_str(rest)
    }
}
