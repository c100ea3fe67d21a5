//! `lodger doctor`: what works on this host, what does not, and how to get it.

use std::process::ExitCode;

use lodger_image::{Cache, ImageState};

use crate::registry;

/// Prints the findings.
pub fn examine() -> ExitCode {
    for engine in registry::engines() {
        let name = engine.name();
        match engine.probe() {
            Err(error) => println!("engine {name}: no: {error}"),
            Ok(_) => match engine.stock_guest_problem() {
                None => println!("engine {name}: works"),
                Some(problem) => println!("engine {name}: simple guests only: {problem}"),
            },
        }
    }
    match Cache::open(None) {
        Err(error) => println!("images: no: {error}"),
        Ok(cache) => {
            println!("image cache: {}", cache.dir().display());
            for image in cache.list() {
                let (name, state) = (image.name, image.state);
                match state {
                    ImageState::Ready { .. } => println!("image {name}: built"),
                    ImageState::Absent => {
                        println!("image {name}: not built; get it with: lodger image build {name}");
                    }
                    ImageState::Damaged(reason) => {
                        println!(
                            "image {name}: {reason}; repair it with: lodger image build {name}"
                        );
                    }
                }
            }
        }
    }
    ExitCode::SUCCESS
}
