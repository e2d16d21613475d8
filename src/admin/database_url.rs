//! URLs of other databases on the same server.

use crate::kind::DatabaseKind;
use crate::percent::encode;
use crate::url::{Target, is_url};

/// The URL of `target` with the name of another database.
///
/// # Errors
/// The reason, if the URL names its database in a way that overrides the new name.
pub(crate) fn with_database(target: &Target, database: &str) -> Result<String, String> {
    let url = &target.url;
    if target.kind == DatabaseKind::Postgres && !is_url(url) {
        // If a keyword occurs twice, libpq uses the last value.
        return Ok(target.with_parameters(&[("dbname", database.to_owned())]));
    }
    if target.kind == DatabaseKind::Postgres && target.has_parameter("dbname") {
        return Err("the URL names its database by the parameter `dbname`; write it as the URL's path".into());
    }
    let (before, query) = match url.split_once('?') {
        Some((before, query)) => (before, format!("?{query}")),
        None => (url.as_str(), String::new()),
    };
    let authority = before.find("://").map_or(0, |at| at + 3);
    let end = before[authority..].find('/').map_or(before.len(), |at| authority + at);
    Ok(format!("{}/{}{query}", &before[..end], encode(database)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(url: &str) -> Target {
        Target::parse(url, None).expect(url)
    }

    #[test]
    fn with_database_replaces_only_the_database() {
        let with = |url| with_database(&target(url), "a b\"c").expect(url);
        assert_eq!(with("postgres://u:p@h:1/db?x=y"), "postgres://u:p@h:1/a%20b%22c?x=y");
        assert_eq!(with("postgres://u:p@/db?host=%2Ftmp"), "postgres://u:p@/a%20b%22c?host=%2Ftmp");
        assert_eq!(with("postgres://h"), "postgres://h/a%20b%22c");
        assert_eq!(with("mysql://u:p@h/db"), "mysql://u:p@h/a%20b%22c");
        assert_eq!(with("host=h dbname=db"), "host=h dbname=db dbname='a b\"c'");
        assert_eq!(with("host=h application_name='a://b'"), "host=h application_name='a://b' dbname='a b\"c'");
        assert!(with_database(&target("postgres://h/?dbname=x"), "y").is_err());
        for url in ["postgres://u:p@h:1/db?x=y", "host=h dbname=db", "mysql://u:p@h/db"] {
            assert_eq!(target(&with(url)).database, "a b\"c", "{url}");
        }
    }
}
