//! The URL of the story: the user's, with a name for its sessions and a schema of its own.

/// `url` with parameters added, in its own syntax. Names and values are words of letters, digits and `_=-`.
pub(crate) fn with(url: &str, parameters: &[(&str, &str)]) -> String {
    let mut url = url.to_owned();
    for (name, value) in parameters {
        if url.contains("://") {
            let separator = if url.contains('?') { '&' } else { '?' };
            url.push_str(&format!("{separator}{name}={}", value.replace('=', "%3D")));
        } else {
            url.push_str(&format!(" {name}='{value}'"));
        }
    }
    url
}

/// Whether it sets libpq's `options` itself; a second setting would silently replace it.
pub(crate) fn sets_options(url: &str) -> bool {
    url.split(['?', '&', ' ']).any(|word| word.starts_with("options="))
}
