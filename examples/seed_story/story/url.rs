//! The URL of the story: the user's URL, with a name for the sessions and a schema of its own.

/// Adds parameters to `url` in its own syntax. Names and values consist of letters, digits and `_=-`.
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

/// Whether the URL sets libpq's `options`. A second setting would silently replace the first.
pub(crate) fn sets_options(url: &str) -> bool {
    url.split(['?', '&', ' ']).any(|word| word.starts_with("options="))
}
