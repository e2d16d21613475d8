//~ error[E0277]: `Rc<diesel_session::unit_of_work::tracked_row::TrackedRow<User>>` cannot be sent between threads safely
use errors::{DB, Db, User};

fn main() {
    let session: Db = DB.session().unwrap();
    let user = session.find::<User>(1).unwrap();
    std::thread::spawn(move || user.read().name.clone());
}
