//~ error: a test has one parameter at most, the application: `app: App<C>`
//~ other: App<SqliteConnection>
use diesel::SqliteConnection;
use diesel_session::App;
use errors::DB;

#[diesel_session::test(DB)]
fn reads(app: App<SqliteConnection>, other: App<SqliteConnection>) {}

fn main() {}
