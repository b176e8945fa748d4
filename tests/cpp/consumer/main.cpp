#include <quantempo/quantempo.hpp>

#include <cstdio>

int main(int, char** words) {
  quantempo::OpenOptions open;
  open.library = words[2];
  open.threads = 1;
  quantempo::Session session(words[1], open);
  quantempo::Options options;
  options.labels = {3};
  options.seed = 1;
  options.steps = 4;
  options.decode = false;
  std::printf("%.9g\n", static_cast<double>(session.sample(options).latents().at(0)));
  return 0;
}
